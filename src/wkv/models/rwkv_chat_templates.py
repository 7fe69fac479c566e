"""The official prompt formats of RWKV models as chat templates for `tokenizer.apply_chat_template`.

`world`: World, v5, v6, v7. `g1`: G0 and G1 models, that with thinking and function calls. `raven`: RWKV-4 Raven, with
Bob and Alice, or an instruction. A blank line ends a turn in the training text, so there is none inside a system or
user text; assistants may write them. Sources: the templates and chat programs of RWKV-LM and ChatRWKV.
"""

# What all begin with: the text of a message, without blank lines where it is not the assistant's, and who may follow
# whom. A conversation may end with any message.
_COMMON = r"""{%- set before = {'system': ['the start'], 'user': ['the start', 'system', 'assistant'],
    'assistant': ['user', 'tool'], 'tool': ['assistant', 'tool']} %}
{%- macro check(loop, role, roles) %}
    {%- set previous = 'the start' if loop.first else loop.previtem['role'] %}
    {%- if role not in roles %}
        {{- raise_exception("role '" ~ role ~ "' is not one of " ~ roles | join(', ')) }}
    {%- elif previous not in before[role] %}
        {{- raise_exception("message " ~ loop.index ~ ": role '" ~ role ~ "' cannot follow " ~ previous) }}
    {%- endif %}
{%- endmacro %}
{%- macro plain(content) %}
    {{- (content if content is string else content | map(attribute='text') | join('\n')).strip() }}
{%- endmacro %}
{%- macro cleaned(content) %}
    {{- plain(content).replace('\r\n', '\n').split('\n') | select('ne', '') | join('\n') }}
{%- endmacro %}
"""

_WORLD = r"""{%- for message in messages %}
    {{- check(loop, message['role'], ['system', 'user', 'assistant']) }}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant:' }}
        {%- generation %}
            {{- ' ' + plain(message['content']) + '\n\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['role'] | capitalize + ': ' + cleaned(message['content']) + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}"""

# `enable_thinking`: true thinks, false thinks an empty thought, undefined leaves it out. `reasoning_effort` low, medium
# or high is a hint behind the last user message. With `tools` the answer is a function call.
_G1 = r"""{%- set effort = {'low': ' (think a bit)', 'medium': ' (think)', 'high': ' (think a lot)'} %}
{%- if reasoning_effort is defined and reasoning_effort not in effort %}
    {{- raise_exception("reasoning_effort '" ~ reasoning_effort ~ "' is not one of low, medium, high") }}
{%- endif %}
{%- if tools %}
    {{- 'System: ' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- cleaned(messages[0]['content']) + '\n' }}
    {%- endif %}
    {{- 'Tools:\n[\n' }}
    {%- for tool in tools %}
        {%- set f = tool['function'] if 'function' in tool else tool %}
        {%- set arguments = f['parameters']['properties'] if 'parameters' in f else f['arguments'] | default({}) %}
        {{- {'name': f['name'], 'description': f['description'] | default(''), 'arguments': arguments}
            | tojson(separators=(',', ':')) + (',\n' if not loop.last else '\n') }}
    {%- endfor %}
    {{- ']\nReturn only a JSON function call.\n\n' }}
{%- endif %}
{%- for message in messages %}
    {{- check(loop, message['role'], ['system', 'user', 'assistant', 'tool']) }}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant:' }}
        {%- generation %}
            {{- ' ' }}
            {%- if message['reasoning_content'] %}
                {{- '<think>\n' + message['reasoning_content'].strip() + '\n</think>\n' }}
            {%- endif %}
            {{- plain(message['content'] | default('')) }}
            {%- if message['tool_calls'] %}
                {%- if message['tool_calls'] | length > 1 %}
                    {{- raise_exception("message " ~ loop.index ~ ": one function call a message, not several") }}
                {%- endif %}
                {%- set call = message['tool_calls'][0] %}
                {%- set f = call['function'] if 'function' in call else call %}
                {%- set arguments = f['arguments'] if f['arguments'] is string
                    else f['arguments'] | tojson(separators=(',', ':')) %}
                {{- ('\n' if message['content'] else '') + '```json\n{"name":' + f['name'] | tojson + ',"arguments":'
                    + arguments + '}\n```' }}
            {%- endif %}
            {{- '\n\n' }}
        {%- endgeneration %}
    {%- elif message['role'] == 'tool' %}
        {{- 'User: Function output:\n' + cleaned(message['content']) + '\n\n' }}
    {%- elif message['role'] == 'user' %}
        {{- 'User: ' + cleaned(message['content']) }}
        {{- effort[reasoning_effort] if loop.last and reasoning_effort is defined }}
        {{- '\n\n' }}
    {%- elif not tools %}
        {{- 'System: ' + cleaned(message['content']) + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
    {%- if enable_thinking is defined or reasoning_effort is defined %}
        {{- ' <think' if enable_thinking | default(true) else ' <think>\n</think' }}
    {%- elif tools %}
        {{- ' ```json' }}
    {%- endif %}
{%- endif %}"""

# `instruction`, a template variable: one instruction and its response instead of a chat; `input` is its context.
_RAVEN = r"""{%- for message in messages %}
    {{- check(loop, message['role'], ['system', 'user', 'assistant']) }}
    {%- if instruction and (message['role'] == 'system' or loop.index > 2) %}
        {{- raise_exception("an instruction is one user message, and one assistant message at most") }}
    {%- elif message['role'] == 'assistant' %}
        {{- '' if instruction else 'Alice:' }}
        {%- generation %}
            {{- ('' if instruction else ' ') + plain(message['content']) + '\n\n' }}
        {%- endgeneration %}
    {%- elif message['role'] == 'system' %}
        {{- '\n' + plain(message['content']).replace('\r\n', '\n') + '\n\n' }}
    {%- elif instruction %}
        {{- '\nBelow is an instruction that describes a task' }}
        {{- ', paired with an input that provides further context' if input }}
        {{- '. Write a response that appropriately completes the request.\n\n' }}
        {{- '# Instruction:\n' + cleaned(message['content']) + '\n\n' }}
        {{- '# Input:\n' + cleaned(input) + '\n\n' if input }}
        {{- '# Response:\n' }}
    {%- else %}
        {{- 'Bob: ' + cleaned(message['content']) + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not instruction %}
    {{- 'Alice:' }}
{%- endif %}"""

CHAT_TEMPLATES = {"world": _COMMON + _WORLD, "g1": _COMMON + _G1, "raven": _COMMON + _RAVEN}
