"""What ranks run: instruction streams, transports, the executor and its traces."""
