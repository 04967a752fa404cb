"""Routines compiled on the machine they run on, for the threads that torch has already (``routine``)."""
