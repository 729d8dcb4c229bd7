"""Fixtures that any test may ask for."""

from hypothesis import settings

# On a busy machine a slow example is not a wrong one; a failure prints what repeats it.
settings.register_profile("yard", deadline=None, print_blob=True)
settings.load_profile("yard")

pytest_plugins = ["support.nats"]
