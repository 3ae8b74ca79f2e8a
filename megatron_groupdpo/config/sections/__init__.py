"""The sections of a configuration, as frozen dataclasses; the docs of their fields are the help."""
