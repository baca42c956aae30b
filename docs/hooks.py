"""A hook of MkDocs: each notebook in docs/ becomes a page, as it was last run; nothing is run here."""

import json
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page beside each notebook."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        cells = json.loads(notebook.content_string)["cells"]
        page = "\n\n".join(part for cell in cells for part in parts(cell))
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to a notebook to its page; where Markdown is read as it is, they lead to the notebook."""
    return markdown.replace(".ipynb)", ".md)")


def parts(cell: dict[str, Any]) -> Iterator[str]:
    """A cell and its outputs as Markdown."""
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    for output in cell.get("outputs", []):
        data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
        if "image/png" in data:
            yield f"![Figure](data:image/png;base64,{data['image/png'].strip()})"
        elif "text/html" in data:
            yield data["text/html"].replace(' border="1" class="dataframe"', "")
        else:
            yield f"```text\n{data.get('text/plain', ''.join(output.get('text', []))).rstrip()}\n```"
