"""Exports beside each other and beside the alternatives: speed, and what each form costs in accuracy."""
