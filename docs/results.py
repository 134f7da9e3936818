"""A hook of MkDocs: the benchmarks' results, which lie beside the pages and not among them, are part of the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "benchmarks/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every JSON file of benchmarks/results as results/NAME."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / RESULTS).glob("*.json*")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to ../benchmarks/results/NAME, which are right in the repository, lead to results/NAME."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return markdown.replace(f"({up}{RESULTS}/", f"({up[3:]}results/")
