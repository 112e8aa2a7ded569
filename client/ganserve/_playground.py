"""A web page to try a server's models: `ganserve playground`. Needs the extra `playground` (gradio).

The page talks only to this process, and this process only to the server: fonts and scripts come with gradio, whose
analytics are off. The page embeds pictures as the files that the SDK writes, so that a download, by the link or by the
browser's menu, keeps its provenance.
"""

import base64
import html
import io
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import IO, Any, Literal, NamedTuple

# gradio reads these when it is imported. A local page must send nothing to other hosts.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gradio as gr

from ganserve import Client
from ganserve._formats import FORMATS
from ganserve.errors import FLAGS, GanserveError, UnavailableError
from ganserve.images import ImageBatch
from ganserve.models import Attribute, Model

_LOOK_EVERY_S = 2.0
_LARGEST_SEED = (1 << 32) - 1
_LARGEST_DRAGGED = 9999  # the largest seed of a slider, whose values can still be hit by hand
_LATENCIES_KEPT = 60
_SLIDER_STEPS = 100
_FILM_PIXELS = 8 << 20  # of all pictures of an animation: 32 of 512x512, 8 of 1024x1024

# For each model: its name, its versions, and the digest of the newest.
_Seen = tuple[tuple[str, tuple[int, ...], str], ...]


class _Listed(NamedTuple):
    """The attributes of the model that the page shows."""

    model: str = ""
    digest: str = ""
    attributes: tuple[Attribute, ...] = ()


class _Choice(NamedTuple):
    """The model, version and label of a session. Kept on the page's server: a browser may still send old choices."""

    model: str = ""
    version: int = 0  # 0: the newest
    label: int | None = None
    most_pictures: int = 2  # of an animation


_CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto;
  --faint: color-mix(in srgb, var(--body-text-color) 64%, transparent); }
input[type=range]::-webkit-slider-thumb { border: 2px solid var(--color-accent) !important; }
footer { display: none !important; }
#title h1 { margin: 0; font-size: 1.5rem; }
#title p { margin: 0; color: var(--faint); }
#notice:not(:has(.down)) { display: none; }
#notice .down { padding: .7rem 1rem; border-radius: var(--radius-lg); border: 1px solid #d97706;
  background: color-mix(in srgb, #d97706 14%, transparent); overflow-wrap: anywhere; }
.form:has(.seed) { gap: 0 !important; }
.seed { padding-bottom: 0 !important; }
.seed label { display: grid !important; grid-template-columns: 1fr 7rem; align-items: center; }
.seed label * { margin: 0 !important; }
.seed input { grid-column: 2; grid-row: 1 / span 2; padding: .3rem .5rem !important; }
.seed-slider .head { display: none !important; }
#classes .wrap { max-height: 15rem; overflow-y: auto; }
.picture { display: flex; flex-direction: column; gap: .75rem; align-items: center; }
.picture img { image-rendering: pixelated; border-radius: var(--radius-lg);
  background: repeating-conic-gradient(#777 0 25%, #999 0 50%) 0 0 / 16px 16px; /* behind alpha */
  border: 1px solid var(--border-color-primary); }
.picture img.large { width: min(100%, 448px); }
.picture img.strip { width: 100%; border-radius: var(--radius-sm); }
.picture .caption { color: var(--faint); text-align: center; }
.picture .ends { display: flex; gap: 1rem; flex-wrap: wrap; justify-content: center; align-items: end; width: 100%; }
.picture .ends figure { margin: 0; text-align: center; color: var(--faint); flex: 1 1 120px;
  max-width: 150px; }
.picture .ends figure.film { flex: 2 1 200px; max-width: 280px; }
.picture .ends img { width: 100%; }
.picture a.download { padding: .45rem 1rem; border-radius: var(--button-medium-radius, 8px); text-decoration: none;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
.picture a.download:hover { background: var(--button-secondary-background-fill-hover); }
.latency { display: flex; justify-content: space-between; align-items: end; gap: 1rem; flex-wrap: wrap; }
.latency b { font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.latency small { color: var(--faint); font-variant-numeric: tabular-nums; }
.latency svg { width: 100%; height: 34px; fill: var(--color-accent); }
.card table { width: 100%; border-collapse: collapse; font-size: .9rem; margin: 0 0 1.1rem; }
.card td { padding: .22rem 0 !important; border: 0 !important; vertical-align: top;
  border-top: 1px solid var(--border-color-primary) !important; }
.card td:last-child { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card td:first-child { color: var(--faint); padding-right: .6rem !important;
  overflow-wrap: anywhere; }
.card table, .card tr, .card tbody { border: 0 !important; }
.card h3 { margin: 0 0 .35rem; font-size: 1rem; }
.card [title] { cursor: help; text-decoration: underline dotted; text-underline-offset: 3px; }
"""


def run(client: Client, *, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        OSError: the page cannot listen on the host and port.
    """
    shown = f"[{host}]" if ":" in host else host
    page = build(client)
    page.queue(default_concurrency_limit=16)
    try:
        page.launch(
            server_name=shown,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,  # otherwise gradio starts Node.js, if it is installed
            footer_links=[],
            css=_CSS,
            theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise OSError(
            f"cannot open the page at {shown}:{port}: the port is in use, or the host is not this machine; choose "
            "another port with --port"
        ) from error
    everywhere = host in ("0.0.0.0", "::")
    url = f"http://{'127.0.0.1' if everywhere else shown}:{port}"
    others = ", and on this machine's other addresses" if everywhere else ""
    print(f"to try the models of {client.address}, open {url}{others}; Ctrl-C ends the program", flush=True)
    try:
        client.models(timeout_s=_LOOK_EVERY_S)
    except GanserveError as error:
        print(f"ganserve: {error.with_names(FLAGS)}; the page keeps trying", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()  # for Ctrl-C
    finally:
        page.close(verbose=False)


def build(client: Client) -> Any:
    """Make the page, as gradio's Blocks."""
    with gr.Blocks(title="ganserve playground", analytics_enabled=False, fill_width=True) as page:
        known = gr.State(None)  # the last `_Seen`; None while the server does not answer
        choice = gr.State(_Choice())
        latencies = gr.State([])
        listed = gr.State(_Listed())
        attributes = gr.State({})  # the values that were set
        tab = gr.State("picture")
        gr.HTML(f"<h1>ganserve</h1><p>the models of {html.escape(client.address)}</p>", elem_id="title")
        notice = gr.HTML(elem_id="notice")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                model = gr.Dropdown([], label="Model", elem_id="model")
                version = gr.Dropdown([("newest", 0)], value=0, label="Version", elem_id="version", visible=False)
                label = gr.Radio([], label="Class", elem_id="classes", visible=False)
                truncation = gr.Slider(
                    0,
                    2,
                    1,
                    step=0.05,
                    label="Truncation",
                    info="below 1: more typical, less varied",
                    elem_id="truncation",
                )

                @gr.render(inputs=listed)  # type: ignore[untyped-decorator]
                def controls(shown: _Listed) -> None:
                    for each in shown.attributes:
                        control = _control(each)
                        control.input(
                            partial(_with_value, each), [attributes, control], attributes, show_progress="hidden"
                        ).then(**drawn)

                latency = gr.HTML(elem_id="latency")
            with gr.Column(scale=5, min_width=360), gr.Tabs():
                with gr.Tab("One picture") as one:
                    seed = _seed("Seed", 1, "seed")
                    picture = gr.HTML(elem_id="picture")
                with gr.Tab("Between two pictures") as between:
                    with gr.Row():
                        seed_a = _seed("From seed", 1, "seed-a")
                        seed_b = _seed("To seed", 2, "seed-b")
                    with gr.Row():
                        steps = gr.Slider(2, 32, 16, step=1, label="Pictures", elem_id="steps")
                        kind = gr.Radio(["slerp", "linear"], value="slerp", label="Way", elem_id="kind")
                    film = gr.HTML(elem_id="film")
            with gr.Column(scale=3, min_width=280):
                card = gr.HTML(elem_id="card")

        def look(seen: _Seen | None) -> Any:
            """Ask for the models: this notices that the server is gone, is back, or has a new version."""
            try:
                models = client.models()
            except GanserveError as error:
                return {known: None, notice: _notice(error)}
            sees = tuple((each.name, each.versions, each.digest) for each in models)
            return gr.skip() if sees == seen else {known: sees, notice: ""}

        def describe(seen: _Seen | None, wanted: _Choice, before: _Listed) -> Any:
            if not seen:
                return gr.skip()
            versions_of = {name: versions for name, versions, _ in seen}
            name = wanted.model if wanted.model in versions_of else next(iter(versions_of))
            versions = versions_of[name]
            number = wanted.version if wanted.version in versions else 0
            try:
                described = client.model(name, number or None)
            except GanserveError as error:
                return {notice: _notice(error)}
            classes = [
                (each if each == str(index) else f"{index}: {each}", index)
                for index, each in enumerate(described.class_names)
            ]
            index = (wanted.label if (wanted.label or 0) < len(classes) else 0) or 0 if classes else None
            now = _Listed(name, described.digest, described.attributes)
            choices = [("newest", 0), *((str(each), each) for each in reversed(versions))]
            return {
                choice: _Choice(name, number, index, max(2, _FILM_PIXELS // (described.height * described.width))),
                **({} if now == before else {listed: now, attributes: {}}),
                truncation: gr.update(visible=True)
                if described.truncation != "none"
                else gr.update(value=1, visible=False),
                model: gr.update(choices=list(versions_of), value=name),
                version: gr.update(choices=choices, value=number, visible=len(versions) > 1),
                label: gr.update(choices=classes, value=index, visible=bool(classes)),
                card: _card(described),
            }

        def draw(
            seen: _Seen | None,
            chosen: _Choice,
            scale: float,
            shown: str,
            one_seed: int | None,
            first: int | None,
            last: int | None,
            count: int,
            way: Literal["slerp", "linear"],
            before: list[float],
            values: dict[str, float],
        ) -> Any:
            if not seen or None in ((first, last) if shown == "film" else (one_seed,)):
                return gr.skip()  # no server yet, or an empty box
            common: dict[str, Any] = {
                "label": chosen.label,
                "truncation": scale,
                "attributes": values,
                "version": chosen.version or None,
            }
            started = time.perf_counter()
            try:
                if shown == "film":
                    most = min(int(count), chosen.most_pictures)
                    walk = client.interpolate(chosen.model, first or 0, last or 0, most, kind=way, **common)
                    return {notice: "", film: _film(walk, time.perf_counter() - started)}
                batch = client.generate(chosen.model, seed=one_seed, **common)
            except UnavailableError as error:
                # Forget the models: the next look that reaches the server then draws the picture.
                return {known: None, notice: _notice(error)}
            except GanserveError as error:
                return {notice: _notice(error)}
            after = [*before, time.perf_counter() - started][-_LATENCIES_KEPT:]
            return {notice: "", picture: _picture(batch), latencies: after, latency: _latency(after, batch)}

        looking = {"fn": look, "inputs": known, "outputs": [known, notice], "show_progress": "hidden"}
        page.load(**looking)
        gr.Timer(_LOOK_EVERY_S).tick(**looking)
        described = {
            "outputs": [notice, choice, model, version, label, card, listed, attributes, truncation],
            "show_progress": "hidden",
        }
        drawn = {
            "fn": draw,
            "inputs": [known, choice, truncation, tab, seed, seed_a, seed_b, steps, kind, latencies, attributes],
            "outputs": [known, notice, picture, film, latencies, latency],
            "show_progress": "hidden",
            "trigger_mode": "always_last",
        }
        known.change(describe, [known, choice, listed], **described).then(**drawn)
        model.input(
            lambda seen, old, name, before: describe(seen, old._replace(model=name), before),
            [known, choice, model, listed],
            **described,
        ).then(**drawn)
        version.input(
            lambda seen, old, number, before: describe(seen, old._replace(version=number), before),
            [known, choice, version, listed],
            **described,
        ).then(**drawn)
        label.input(lambda old, index: old._replace(label=index), [choice, label], choice, show_progress="hidden").then(
            **drawn
        )
        gr.on([each.change for each in (truncation, seed, seed_a, seed_b, steps, kind, tab)], **drawn)
        one.select(lambda: "picture", None, tab)
        between.select(lambda: "film", None, tab)
    return page


def _seed(label: str, value: int, elem_id: str) -> Any:
    """Make a box for any seed, with a slider for small seeds below it; return the box."""
    with gr.Group():
        box = gr.Number(
            value,
            label=label,
            info=f"0 to {_LARGEST_SEED}",
            precision=0,
            minimum=0,
            maximum=_LARGEST_SEED,
            elem_id=f"{elem_id}-box",
            elem_classes="seed",
        )
        slider = gr.Slider(
            0,
            _LARGEST_DRAGGED,
            value,
            step=1,
            label=label,
            show_label=False,
            elem_id=elem_id,
            elem_classes="seed-slider",
        )
    # In the browser, so that box and slider follow each other without a request to the page's server.
    slider.input(None, slider, box, js="seed => seed", show_progress="hidden")
    box.input(None, box, slider, js=f"seed => Math.min(seed, {_LARGEST_DRAGGED})", show_progress="hidden")
    return box


def _control(attribute: Attribute) -> Any:
    """Make a slider for an attribute, or a check box if it is binary."""
    low, high = attribute.minimum, attribute.maximum
    name: Any = {"label": attribute.name, "elem_classes": "attribute", "interactive": True}
    if attribute.binary:
        return gr.Checkbox(attribute.default == high, **name)
    return gr.Slider(low, high, attribute.default, step=(high - low) / _SLIDER_STEPS, **name)


def _with_value(attribute: Attribute, values: dict[str, float], value: float | bool) -> dict[str, float]:
    """Return the values of the attributes with a new one, from a control."""
    if attribute.binary:
        value = attribute.maximum if value else attribute.minimum
    return {**values, attribute.name: value}


def _notice(error: GanserveError) -> str:
    again = " Trying again every two seconds." if isinstance(error, UnavailableError) else ""
    return f'<div class="down" role="alert">{html.escape(error.with_names(FLAGS))}.{again}</div>'


def _picture(batch: ImageBatch) -> str:
    uri = _data_uri("PNG", partial(batch[0].save, format="PNG"))
    made = batch[0].provenance
    name = "-".join(str(part) for part in (made.model, made.label, made.seed) if part is not None) + ".png"
    text = f"{made.model} version {made.version}, class {made.label}, seed {made.seed}, truncation {made.truncation:g}"
    text += "".join(f", {name} {value:g}" for name, value in (batch[0].attributes or {}).items())
    return f"""
        <div class="picture"><img class="large" src="{uri}" alt="{html.escape(text)}">
        <a class="download" href="{uri}" download="{html.escape(name)}">Download {html.escape(name)}</a></div>"""


def _film(walk: ImageBatch, seconds: float) -> str:
    first, last = (_data_uri("PNG", partial(walk[end].save, format="PNG")) for end in (0, -1))
    width, channels = walk.pixels.shape[2:]
    # Colours take a GIF 1.7 s for a frame of 1024x1024, ten times as long as a WebP, and GIF has no alpha.
    moving = FORMATS["GIF" if channels == 1 else "WEBP"]
    film = _data_uri(moving.name, lambda file: walk.gif(file, moving.name, scale=max(1, 280 // width)))
    strip = _data_uri("PNG", lambda file: walk.sheet(columns=min(len(walk), 8)).save(file, "PNG"))
    way = walk.interpolation
    assert way is not None
    ends = (way.seed_a, way.seed_b)
    label = () if walk.labels is None else walk.labels[:1]
    name = html.escape("-".join(map(str, (walk.model, *label, *ends))) + moving.extensions[0])
    return f"""
        <div class="picture">
        <div class="ends">
          <figure><img src="{first}" alt="the first"><figcaption>seed {ends[0]}</figcaption></figure>
          <figure class="film"><img src="{film}" alt="animation"><figcaption>forward and back</figcaption></figure>
          <figure><img src="{last}" alt="the last"><figcaption>seed {ends[1]}</figcaption></figure>
        </div>
        <img class="strip" src="{strip}" alt="all {len(walk)} pictures">
        <div class="caption">{len(walk)} pictures in {seconds * 1000:.1f} ms</div>
        <a class="download" href="{film}" download="{name}">Download {name}</a></div>"""


def _data_uri(name: str, save: Callable[[IO[bytes]], object]) -> str:
    """Return a file of the SDK, with its provenance, as a data URI for the page."""
    file = io.BytesIO()
    save(file)
    return f"data:{FORMATS[name].media_type};base64,{base64.b64encode(file.getvalue()).decode()}"


def _latency(seconds: list[float], batch: ImageBatch) -> str:
    ms = [1000 * each for each in seconds]
    top = max(ms)
    bars = "".join(
        f'<rect x="{place}" y="{34 - 34 * each / top:.1f}" width=".7" height="{34 * each / top:.1f}"/>'
        for place, each in enumerate(ms)
    )
    return f"""
        <div class="latency">
        <span><b>{ms[-1]:.1f} ms</b> <small>round trip</small></span>
        <small>median of {len(ms)}: {statistics.median(ms):.1f} ms</small>
        <svg viewBox="0 0 {_LATENCIES_KEPT} 34" preserveAspectRatio="none" role="img"
          aria-label="the last {len(ms)} round trips">{bars}</svg>
        <small>{1000 * batch.queue_s:.2f} ms in the queue, {1000 * batch.compute_s:.2f} ms of computing on
        {html.escape(batch.provider.removesuffix("ExecutionProvider"))}</small>
        </div>"""


def _card(model: Model) -> str:
    training = model.card.get("training", {})
    facts = {
        "version": str(model.version),
        "network": model.architecture,
        "data set": model.dataset,
        "images": f"{model.height} × {model.width} × {model.channels}",
        "latents": str(model.latent_dim),
        "parameters": f"{int(model.card.get('generatorParameters', 0)):,}",
        "precision": model.card.get("precision", "fp32"),
        "images seen": f"{int(training.get('imagesSeen', 0)):,}",
        "trained on": training.get("device", ""),
        "exported": model.card.get("createdAt", "")[:10],
        "file": model.digest[:15] + "…",
    }
    known = "".join(f"<tr><td>{key}</td><td>{html.escape(value)}</td></tr>" for key, value in facts.items() if value)
    measured = "".join(
        f'<tr><td><span title="{html.escape(metric.method)}">{html.escape(metric.name.replace("_", " "))}</span></td>'
        f"<td>{metric.text()}</td></tr>"
        for metric in model.metrics
    )
    quality = f"<h3>Quality</h3><table>{measured}</table>" if measured else ""
    return f'<div class="card"><h3>{html.escape(model.name)}</h3><table>{known}</table>{quality}</div>'
