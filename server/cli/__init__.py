"""Floor 7: the commands, and the construction of a server from its settings.

``command_line`` reads settings and options, ``folders`` finds adapters; ``serve_command`` and ``serve`` are the server
(with ``access``, ``listening``, ``reload``, ``adapter_services`` and ``allocation``), ``chat`` a client of it, ``keys``
makes API keys. ``adapters`` chooses among ``adapters_list``,
``adapters_check`` (with ``adapter_checker`` and ``parity``), ``adapters_add``, ``adapters_pins`` and the package
``convert``. ``base`` chooses among ``base_list`` and ``base_get`` (with ``pip_download``).
"""
