"""The pair as a local service: an OpenAI-compatible API, what it tells of itself, and its dashboard."""
