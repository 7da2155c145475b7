"""A client of the server, for programs: ``Client``, and ``AsyncClient`` with the same methods."""

from bertology_serve.client.aio import AsyncClient
from bertology_serve.client.sync import Client
from bertology_serve.tasks.answers import Answer, Entity, Model, Span, Version

__all__ = ["Answer", "AsyncClient", "Client", "Entity", "Model", "Span", "Version"]
