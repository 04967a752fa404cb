"""The command ``llm``: a prompt, a schema, functions. Prints a JSON report. usage: python llm_client.py URL MODEL"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, MODEL = sys.argv[1:]
FUNCTION = '''
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b
'''

with tempfile.TemporaryDirectory() as folder:
    config = f"- {{model_id: quickchange, model_name: {MODEL}, api_base: '{URL}/v1'"
    Path(folder, "extra-openai-models.yaml").write_text(f"{config}, supports_tools: true, supports_schema: true}}\n")

    def llm(*arguments: str) -> str:
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        command = [str(Path(sys.executable).with_name("llm")), "-m", "quickchange", "-o", "temperature", "0"]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        return done.stdout if done.returncode == 0 else f"status {done.returncode}: {done.stderr[-500:]}"

    report = {
        "prompt": llm("-o", "max_tokens", "32", "Name a fruit."),
        "not streamed": llm("--no-stream", "-o", "max_tokens", "32", "Name a fruit."),
        "schema": llm("-o", "max_tokens", "200", "--schema", json.dumps({
            "type": "object", "properties": {"color": {"enum": ["red", "green"]}}, "required": ["color"],
            "additionalProperties": False}), "A color."),
        "functions": llm("-o", "max_tokens", "64", "--functions", FUNCTION, "--tools-debug", "What is 2 times 3?"),
    }  # fmt: skip
print(json.dumps(report))
