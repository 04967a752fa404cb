"""``/openapi.json``: every route with its bodies, statuses and media types.

``answers`` has the models of successful answers, ``bodies`` what request bodies are really accepted, ``document`` puts
them together.
"""
