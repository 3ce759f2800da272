"""A whole page inside another one, such as a notebook."""

from html import escape

_NO_ADDRESS = "<script>history.replaceState = () => {}</script>"
"""A page in such a frame has no address in which it could keep its state."""


def framed(page: str, height: int) -> str:
    """A page as an inline frame that neither styles nor reads the page around it.

    Args:
        page: a whole HTML document. Its scripts run, in an origin of their own.
        height: of the frame, in pixels.
    """
    page = page.replace("<head>", f"<head>{_NO_ADDRESS}", 1)
    return (
        f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts allow-downloads" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )
