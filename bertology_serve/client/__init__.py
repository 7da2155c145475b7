"""A client of the server, for programs: ``Client``, and ``AsyncClient`` with the same methods."""

from bertology_serve.client.clients import AsyncClient, Client
from bertology_serve.tasks.answers import Answer, Entity, Model, Span, Version

__all__ = ["Answer", "AsyncClient", "Client", "Entity", "Model", "Span", "Version"]
