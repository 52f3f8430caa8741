"""What the commands share."""


class Mistake(ValueError):
  """What the user can mend: the message alone says what and how."""
