"""What ranks run: instruction lists, transports, the executor and its traces."""
