"""The examples train."""
