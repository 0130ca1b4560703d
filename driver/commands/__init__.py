"""The subcommands of `bactrian`, a file each: a summary, what it takes, and what it does."""
