"""What tests of several folders share: models and independent oracles."""
