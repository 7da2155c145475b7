"""The families of encoders by the ``model_type`` of their configuration: all that is one family's own stands here.

A family that is not named here is run through transformers' attention interface where it has it, padded where it has
not, and has no head but a linear one.
"""

from __future__ import annotations

from bertology_serve.families import bert
from bertology_serve.families.deberta import DEBERTA, DEBERTA_V2
from bertology_serve.families.family import Family
from bertology_serve.families.modernbert import MODERNBERT
from bertology_serve.families.mpnet import MPNET

FAMILIES = {family.name: family for family in (*bert.rows(), MPNET, MODERNBERT, DEBERTA, DEBERTA_V2)}


def family_named(name: str) -> Family:
    """The family of that ``model_type``; one of which nothing is known where it is not here."""
    return FAMILIES.get(name) or Family(name)
