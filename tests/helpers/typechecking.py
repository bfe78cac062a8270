"""What checks annotations in tests: `conftest` has it run on modules with shapes."""

from beartype import beartype


def functions(function):
    """As beartype does, but constructors tell what they were given by themselves."""
    return function if function.__name__ == "__init__" else beartype(function)
