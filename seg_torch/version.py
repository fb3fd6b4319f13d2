"""The version of the package and where it is published, which anything may import."""

__version__ = "0.2.0"
# The address of the published repository: whoever publishes it puts it here, and nowhere else.
REPOSITORY = "https://github.com/OWNER/segwright"
