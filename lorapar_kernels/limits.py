"""What the ops accept."""

MAX_RANK = 512
