"""The one exception for everything a user can put right."""


class UserError(ValueError):
    """A message that names the file, line or field, what was found and what is needed."""
