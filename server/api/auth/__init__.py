"""Who may do what: API keys, their scopes and limits, and the middleware that denies by default.

``principal`` is the result for a request, ``keys`` finds it by its key, ``routes`` says which scope a path needs, and
``middleware`` applies both before anything else reads the request.
"""
