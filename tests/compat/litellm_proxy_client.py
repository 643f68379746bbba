"""litellm as a proxy before the service: OpenAI's chats and Anthropic's messages, each also streamed."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
URL = f"http://127.0.0.1:{port}"
MESSAGES = [{"role": "user", "content": "Name a city."}]


def asked(path: str, **body: object) -> str:
    """What the proxy answers."""
    data = json.dumps({"model": "here", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, **body}).encode()
    headers = {"content-type": "application/json", "authorization": "Bearer sk-proxy"}
    with urllib.request.urlopen(urllib.request.Request(f"{URL}{path}", data, headers), timeout=120) as answer:
        return answer.read().decode()


def wait_until_it_lives(proxy: subprocess.Popen[bytes]) -> None:
    """Return once the proxy answers."""
    for _ in range(300):
        assert proxy.poll() is None, "the proxy ended"
        try:
            urllib.request.urlopen(f"{URL}/health/liveliness", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the proxy does not answer")


with tempfile.TemporaryDirectory() as folder:
    to = {"model": f"openai/{os.environ['MODEL']}", "api_base": os.environ["OPENAI_BASE_URL"],
          "api_key": os.environ["OPENAI_API_KEY"]}  # fmt: skip
    config = {"model_list": [{"model_name": "here", "litellm_params": to}]}
    config["general_settings"] = {"master_key": "sk-proxy"}
    file = Path(folder) / "config.yaml"
    file.write_text(json.dumps(config))
    command = [Path(sys.executable).parent / "litellm", "--config", file, "--host", "127.0.0.1", "--port", str(port)]
    proxy = subprocess.Popen(command)
    try:
        wait_until_it_lives(proxy)
        assert json.loads(asked("/v1/chat/completions"))["choices"][0]["message"]["content"]
        assert asked("/v1/chat/completions", stream=True).rstrip().endswith("[DONE]")
        assert json.loads(asked("/v1/messages"))["content"][0]["text"]
        assert "message_stop" in asked("/v1/messages", stream=True)
    finally:
        proxy.terminate()
        proxy.wait()
