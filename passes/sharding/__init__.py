"""Shardings of a program's values over a device mesh: layouts, what moves between them cost, and the choices of an op."""
