"""Which format a chat template has, by a text that only its family writes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from server.text.tools.harmony import Harmony
from server.text.tools.json_calls import JsonCalls
from server.text.tools.keyed_calls import KeyedCalls
from server.text.tools.named_calls import NamedCalls
from server.text.tools.python_calls import PythonCalls
from server.text.tools.tool import ToolFormat
from server.text.tools.xml_calls import XmlCalls

HERMES = JsonCalls("hermes", "<tool_call>\n", "\n</tool_call>")
COMPACT_HERMES = JsonCalls("hermes_compact", "<tool_call>", "</tool_call>", separator="")
LLAMA = JsonCalls("llama3", "", "", arguments_key="parameters", separator="; ", begins=("<|python_tag|>",))
MISTRAL = NamedCalls(
    "mistral", "[TOOL_CALLS]", "[ARGS]", "", marker="[TOOL_CALLS]", separator="", name_ends=("[CALL_ID]",)
)
MISTRAL_LIST = JsonCalls("mistral_list", "[TOOL_CALLS] ", "", in_list=True, separator=", ")
DEEPSEEK_V3 = NamedCalls(
    "deepseek_v3",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    marker="<｜tool▁call▁begin｜>",
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"),
)
DEEPSEEK_V31 = NamedCalls(
    "deepseek_v31",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    marker="<｜tool▁call▁begin｜>",
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    separator="",
    ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
PHI = JsonCalls("phi4", "<|tool_call|>", "<|/tool_call|>", in_list=True, separator=", ", begins=("functools[",))
GRANITE = JsonCalls("granite", "<|tool_call|>", "", in_list=True, separator=", ")
COHERE = JsonCalls(
    "cohere",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    in_list=True,
    name_key="tool_name",
    arguments_key="parameters",
    first_member='"tool_call_id": "0", ',
    separator=", ",
)
APERTUS = KeyedCalls("apertus", "<|tools_prefix|>", "<|tools_suffix|>")
NEMOTRON = JsonCalls("nemotron", "<TOOLCALL>", "</TOOLCALL>", in_list=True, separator=", ")
HUNYUAN = JsonCalls("hunyuan", "<tool_calls>", "</tool_calls>", in_list=True, separator=", ")
GLM = NamedCalls("glm4", "", "\n", "")
QWEN_CODER = XmlCalls("qwen3_coder", "<tool_call>", "</tool_call>", "\n")
SEED = XmlCalls("seed_oss", "<seed:tool_call>", "</seed:tool_call>", "")
OLMO = PythonCalls("olmo3", "<function_calls>", "</function_calls>")
HARMONY = Harmony()

# A template has the first format all of whose texts are in it.
_DETECTED: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<|channel|>", "<|start|>"), HARMONY),
    (("<seed:tool_call>",), SEED),
    (("<function=",), QWEN_CODER),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<｜tool▁call▁begin｜>", "```json"), DEEPSEEK_V3),
    (("<｜tool▁call▁begin｜>",), DEEPSEEK_V31),
    (("<|START_ACTION|>",), COHERE),
    (("<|tools_prefix|>",), APERTUS),
    (("<TOOLCALL>",), NEMOTRON),
    (("<|/tool|>",), PHI),
    (("<|/tool_call|>",), PHI),
    (("<|tool_call|>",), GRANITE),
    (("<function_calls>",), OLMO),
    (("<tool_calls>",), HUNYUAN),
    (("<tool_call>\n",), HERMES),
    (("<tool_call>\\n",), HERMES),
    (("<tool_call>",), COMPACT_HERMES),
    (("<|python_tag|>",), LLAMA),
    (("<|start_header_id|>", '"parameters": '), LLAMA),
    (("<|observation|>",), GLM),
)
FORMATS: Mapping[str, ToolFormat] = {
    format.name: format for format in (*dict.fromkeys(format for _, format in _DETECTED), HERMES)
}


def takes_short_ids(format: ToolFormat | None) -> bool:
    """Whether the templates of a format want ids of nine characters."""
    return format in (MISTRAL, MISTRAL_LIST)


@lru_cache(maxsize=64)
def tool_format(template: str | None) -> ToolFormat:
    """The format of a chat template; Hermes' for a template without one."""
    for texts, format in _DETECTED:
        if template is not None and all(text in template for text in texts):
            return format
    return HERMES
