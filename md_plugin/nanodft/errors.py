"""Errors of nanodft that say what was asked for and what is supported."""


class UnsupportedSystem(ValueError):
    """The molecule, charge or basis set lies outside what nanodft computes."""
