"""Write expected.json: every template here over every conversation, rendered by transformers. Needs transformers."""

import json
from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent


def main() -> None:
    data = json.loads((HERE / "conversations.json").read_text())
    expected: dict[str, dict[str, str | None]] = {}
    for file in sorted(HERE.glob("*.jinja")):
        rows = expected.setdefault(file.stem, {})
        for name, case in data["conversations"].items():
            if file.stem not in case.get("only", [file.stem]):
                continue
            case = {"add_generation_prompt": True, **data["variables"], **case}
            messages, tools = case.pop("messages"), data["tools"] if case.pop("with_tools", False) else None
            case.pop("only", None)
            try:
                texts, _ = render_jinja_template([messages], tools, chat_template=file.read_text(), **case)
                rows[name] = texts[0]
            except TemplateError:  # the template refuses this conversation
                rows[name] = None
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
