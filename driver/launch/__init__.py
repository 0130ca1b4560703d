"""``bactrian run``: ranks are started, watched and told apart."""
