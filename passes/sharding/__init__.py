"""Shardings of a program's values over a device mesh: their cost, reshards between them, and the choices of an op."""
