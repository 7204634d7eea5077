"""A report as one HTML file that needs no network."""

from wancompile.html.extras import Extras, Picture, Table
from wancompile.html.page import write_html

__all__ = ["Extras", "Picture", "Table", "write_html"]
