"""Who may do what: API keys, their scopes and limits, and the middleware that denies by default.

``principal`` is the result for a request, ``keys`` finds it by its key (``key_file`` reads them), ``routes`` says which
scope a path needs, ``key_limits`` and ``wrong_keys`` count. ``access`` has all of them for a server, and ``middleware``
applies them before anything else reads the request.
"""
