"""Sphinx configuration: MyST pages that are run, and the API from docstrings."""

import os
from importlib.metadata import version as installed_version
from pathlib import Path

# Pyro's progress bars miss a widget that no page uses; the kernels inherit this.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "examples")  # a page runs the parts of an example

project = "pyro_vae"
release = version = installed_version("pyro-vae")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build", "jupyter_execute"]
default_role = "literal"  # single backticks in docstrings are code
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # a cell takes seconds, but machines differ
nb_execution_in_temp = True  # what a page writes goes with its run
nb_merge_streams = True
nb_output_stderr = "remove-warn"  # a warning on a page is a warning of the build

autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "extra_repr"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"

napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes are a list of fields, like arguments, so that none is described twice.
napoleon_custom_sections = ["Reference", ("Attributes", "params_style")]


def skip_named_tuple_fields(app, what, name, obj, skip, options):
    """Leave out "Alias for field number 0": the section Attributes describes these."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    """Connect the handler above."""
    app.connect("autodoc-skip-member", skip_named_tuple_fields)
