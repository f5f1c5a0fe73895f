"""Chat templates for models whose file brings none, chosen by the control tokens they know.

Each writes what the family was trained on. None writes the begin-of-text token: encoding adds it
where the vocabulary wants one.
"""

from __future__ import annotations

from twostroke.errors import TemplateError
from twostroke.text.tokenizer import Tokenizer

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Gemma has no system role: its text goes before the first user message.
GEMMA = """\
{%- set lead = namespace(text='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{- raise_exception('a system message must come first') -}}{%- endif -%}
{%- set lead.text = message.content + '\\n\\n' -%}
{%- else -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{- '<start_of_turn>' + role + '\\n' + lead.text + (message.content | trim) -}}
{{- '<end_of_turn>\\n' -}}
{%- set lead.text = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

LLAMA3 = """\
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{{- (message.content | trim) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# Mistral has no system role either; a turn's end is the end-of-text token.
MISTRAL = """\
{%- set lead = namespace(text='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{- raise_exception('a system message must come first') -}}{%- endif -%}
{%- set lead.text = message.content + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{- '[INST] ' + lead.text + message.content + ' [/INST]' -}}
{%- set lead.text = '' -%}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content + eos_token -}}
{%- else -%}
{{- raise_exception('only system, user and assistant messages are known') -}}
{%- endif -%}
{%- endfor -%}
"""

_BY_TOKEN = (
    ("<start_of_turn>", GEMMA),
    ("<|im_start|>", CHATML),
    ("<|start_header_id|>", LLAMA3),
    ("[INST]", MISTRAL),
)


def find_default_template(tokenizer: Tokenizer) -> str:
    """The template source for a model that brings none.

    Raises TemplateError when none of the control tokens the known families use is there.
    """
    for token, source in _BY_TOKEN:
        if tokenizer.has_token(token):
            return source
    known = ", ".join(token for token, _ in _BY_TOKEN)
    raise TemplateError(
        "the model brings no chat template and its vocabulary has none of the tokens a default is "
        f"known for ({known}); send the prompt as plain text to completions (CLI: generate) instead"
    )
