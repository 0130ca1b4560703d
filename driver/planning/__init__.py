"""From a captured program to a plan and its staged module. Needs no device."""
