"""The token store on disk: format, writing, reading."""
