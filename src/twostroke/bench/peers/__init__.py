"""Scripts that run in the peers' own environments; they import nothing of ours.

Each worker prints one line {"ready": ...} and then answers one JSON line with one JSON line:

| request | answer |
|---|---|
| {"op": "prefill", "tokens"} | {"seconds", "tokens"}: reading the prompt; the greedy next token |
| {"op": "decode", "tokens", "steps"} | the same for `steps` tokens written after the prompt |
| {"op": "batch", "prompts", "steps"} | the same for prompts of one length together, a list each |
| {"op": "serve", "requests"} | {"requests": [{"times", "tokens"}]}: when text came; how many |

An operation that an engine cannot do is answered with {"refused": reason}.
"""
