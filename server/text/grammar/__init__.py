"""Floor 1: grammars that an answer must follow, by llguidance. No torch.

Read ``grammar`` (values and their composition), ``schema`` (what a JSON schema may hold), ``compiler`` (limits, cache,
worker threads), ``trial`` (a process in which grammars are tried) and ``matcher`` (the state of one sequence).
A grammar is built from the functions of ``grammar``::

    person = json_schema({"type": "object", ...}, Source("response_format", "response_format 'person'"))
    call = concatenate(literal('<tool_call>\\n{"name": "find", "arguments": '), person, literal("}\\n</tool_call>"))
    one_of([call, other_call])                            # required: one of several tools
    repeat(one_of(calls), separator=literal("\\n"))        # parallel calls
    triggered([("<tool_call>", body)])                    # auto: free text until the trigger, then ``body``

``GrammarCompiler.compile(grammar, tokenizer)`` returns a ``CompiledGrammar`` or raises ``InvalidRequest``;
``SamplingParams.grammar`` takes it, and every sequence gets a matcher of its own.
"""
