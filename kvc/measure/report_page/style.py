"""The look of the page: two themes of one set of variables, a desk, a phone, and paper."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff", "raised": "#f5f6f7", "ink": "#1b1f23", "dim": "#5b636b",
    "rule": "#e4e7ea", "axis": "#9aa3ab", "shade": "#00000026",
    "heat": "#0b4f8a", "deep": "#ffffff", "mark": "#b8420a",
    "c0": "#0063ad", "c1": "#b8420a", "c2": "#00795a", "c3": "#a8387f",
    "c4": "#7d6200", "c5": "#0b7a95", "c6": "#5f4dbd", "c7": "#7a4a2a",
    "p0": "#9cc7e8", "p1": "#f2c08f", "p2": "#a5d8bf", "p3": "#e6b3d2", "p4": "#e3d680",
    "p5": "#c3bdec", "p6": "#d6c3b1", "p7": "#9fd7de", "p8": "#f0a8a0", "p9": "#c8cdd2",
}  # fmt: skip
DARK = {
    "paper": "#14171a", "raised": "#1d2125", "ink": "#e8eaec", "dim": "#a2abb3",
    "rule": "#2b3136", "axis": "#6c757d", "shade": "#000000b0",
    "heat": "#7cc0f5", "deep": "#10151a", "mark": "#ff9a5c",
    "c0": "#6cb4ff", "c1": "#ff9a5c", "c2": "#3fd0a0", "c3": "#f196cf",
    "c4": "#e0c244", "c5": "#55d0ec", "c6": "#b8a9ff", "c7": "#d6ab8b",
    "p0": "#2f5f88", "p1": "#8a5524", "p2": "#2c6b50", "p3": "#7f4068", "p4": "#6b6016",
    "p5": "#544b94", "p6": "#655240", "p7": "#22686f", "p8": "#883f38", "p9": "#4d555c",
}  # fmt: skip
_COLORS = range(8)
_FILLS = range(10)

_PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:120px}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,footer{max-width:1144px;margin:0 auto;padding:0 16px}
h1,h2,h3,p,figure,dl,dd{margin:0}
header{padding:40px 0 8px}
.eyebrow{color:var(--dim);font-size:14px;overflow-wrap:anywhere}
h1{font-size:clamp(26px,4.2vw,40px);line-height:1.15;font-weight:680;letter-spacing:-.018em;
 max-width:24em;margin:6px 0 26px;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:24px;line-height:1.2;letter-spacing:-.01em;font-weight:650;overflow-wrap:anywhere}
h2.run{margin-top:72px;padding-top:20px;border-top:3px solid var(--ink);font-size:28px}
h3{font-size:16px;line-height:1.35;font-weight:650;overflow-wrap:anywhere}
section{margin-top:56px}
section>h3{margin:22px 0 8px}
.note,figcaption p{color:var(--dim);font-size:14px;line-height:1.45;max-width:70ch;
 overflow-wrap:anywhere}
.note{margin-top:4px}
.grid{display:grid;gap:36px 32px;margin-top:20px;
 grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr))}
.maps{display:grid;gap:16px 20px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.chart{display:flex;flex-direction:column;min-width:0}
.chart figcaption{margin-bottom:10px}
.grid .chart>svg{margin-top:auto}
.grid .top>svg{margin-top:0}
.full-width{margin-top:20px}
.map{min-width:0;max-width:200px}
.map figcaption{font-size:13px;font-weight:600;overflow-wrap:anywhere;line-height:1.25}
figcaption svg,th svg,td svg,.key svg,.chip svg{vertical-align:-3px;margin-right:5px;flex:none}
.scroll:focus-visible{outline:2px solid var(--c0)}
.scroll{overflow-x:auto;max-width:100%;
 background:linear-gradient(90deg,var(--paper) 30%,transparent) 0 0/40px 100% local,
  linear-gradient(270deg,var(--paper) 30%,transparent) 100% 0/40px 100% local,
  linear-gradient(90deg,var(--shade),transparent) 0 0/12px 100% scroll,
  linear-gradient(270deg,var(--shade),transparent) 100% 0/12px 100% scroll;
 background-repeat:no-repeat}
"""

_TABLES = """
table{border-collapse:collapse;font-size:14px;line-height:1.35}
caption{text-align:left;color:var(--dim);padding:0 0 6px;font-size:13px}
th,td{padding:5px 12px 5px 0;text-align:left;vertical-align:baseline;font-weight:400;
 border-bottom:1px solid var(--rule);white-space:nowrap}
thead td{border:0}
thead th{color:var(--dim);font-size:13px;border-bottom-color:var(--axis)}
.n{text-align:right;font-variant-numeric:tabular-nums}
td.n+td:not(.n){padding-left:6px}
.summary th[scope=row]{font-weight:600}
.summary thead th:nth-child(n+3){text-align:right}
.summary td:nth-child(2){font-weight:600}
.quiet{color:var(--dim)}
details{margin-top:8px;font-size:14px}
summary{color:var(--dim);cursor:pointer;width:max-content;padding:4px 0}
details table{margin:6px 0 4px;font-size:13px}
details thead th:not(:first-child){text-align:right}
.all{font-size:13px}
.all th[scope=row]{position:sticky;left:0;background:var(--paper);font-weight:600;z-index:1;
 max-width:210px;overflow:hidden;text-overflow:ellipsis;border-right:1px solid var(--rule)}
.all th[scope=colgroup]{font-weight:650;color:var(--ink);border-bottom:0;padding-left:10px}
.all td.n{padding-left:10px}
.all tbody tr:hover>*{background:var(--raised)}
.all thead button{all:unset;cursor:pointer;color:var(--dim);white-space:normal;display:block;
 padding:2px 0;min-width:3.2em;text-align:right;margin-left:auto}
.all thead th:first-child button{text-align:left;margin-left:0}
.all thead button:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
.all [aria-sort=ascending] button::after{content:" \\25B2";font-size:9px}
.all [aria-sort=descending] button::after{content:" \\25BC";font-size:9px}
.all [aria-sort=ascending] button,.all [aria-sort=descending] button{color:var(--ink)}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 20px;font-size:14px;
 margin-top:14px}
dt{color:var(--dim);grid-column:1}dd{grid-column:2;overflow-wrap:anywhere}
"""

_CHARTS = """
svg{display:block;overflow:visible;font:12px/1 system-ui,-apple-system,"Segoe UI",Roboto,
 "Helvetica Neue",Arial,sans-serif}
th svg,td svg,.key svg,.chip svg,figcaption svg{display:inline-block}
svg text{fill:var(--ink)}
.wide,.narrow,.any{width:100%;height:auto}
.wide{max-width:600px}.full-width .wide{max-width:1000px}
.any{max-width:343px}.map .any{max-width:200px}
.narrow{display:none;max-width:440px}
svg .tick,svg .title,svg .better,svg .part{font-size:11px}
svg .tick,svg .title,svg .better{fill:var(--dim)}
svg .tick{font-variant-numeric:tabular-nums}
.grid{--line:var(--rule)}
line.grid{stroke:var(--rule)}
.axis{stroke:var(--axis)}
.break{stroke:var(--axis);stroke-dasharray:1 3}
svg.cut{overflow:hidden}
.hollow{fill-opacity:.18;stroke-width:1.5}
.label,.halo{paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}
.full{stroke:var(--ink);stroke-dasharray:2 4;opacity:.7}
.front{fill:none;stroke:var(--ink);stroke-width:1.25;opacity:.55}
.leader{stroke:currentColor;opacity:.45;stroke-width:1}
.ink{color:var(--ink)}
.on .on{fill:currentColor;stroke:var(--paper);stroke-width:1.5}
.off .off{fill:var(--paper);stroke:currentColor;stroke-width:1.6}
g.m .label{fill:currentColor}
g.on .label{font-weight:650}
.line{fill:none;stroke:currentColor;stroke-width:1.75;stroke-linejoin:round}
.d1 .line{stroke-dasharray:6 3}.d2 .line{stroke-dasharray:2 3}.d3 .line{stroke-dasharray:9 3 2 3}
.dot{fill:currentColor;stroke:transparent;stroke-width:12}
g.quiet{color:var(--axis)}g.quiet .line{stroke-width:1;opacity:.55}g.quiet .dot{fill:none}
.blank{fill:var(--raised)}
.paper{fill:var(--raised)}
.heat{fill:var(--heat)}
svg .in{font-size:10px;font-variant-numeric:tabular-nums;pointer-events:none}
svg .pale{fill:var(--ink)}svg .deep{fill:var(--deep)}
.mark{fill:none;stroke:var(--mark);stroke-width:2.25}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:2px 0 10px}
.hollow{stroke:var(--own)}
.keys i{background:var(--own);display:inline-block;
 width:11px;height:11px;border-radius:2px;margin-right:6px}
.keys i.hollow{background:none;box-shadow:inset 0 0 0 2px var(--own)}
.part{pointer-events:none}
"""

_CONTROLS = """
.contents{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:24px;font-size:14px}
a{color:var(--c0);text-underline-offset:2px;text-decoration-thickness:1px}
.bar{position:sticky;top:0;z-index:3;display:flex;gap:8px;align-items:flex-start;padding:7px 16px;
 background:var(--paper);border-bottom:1px solid var(--rule)}
.chips{display:flex;flex-wrap:wrap;gap:1px 2px;flex:1;min-width:0;overflow:auto;max-height:104px;
 scrollbar-width:thin;padding:2px}
button{font:inherit;font-size:13px;color:var(--ink);background:var(--raised);cursor:pointer;
 border:1px solid var(--rule);border-radius:7px;padding:3px 10px;white-space:nowrap;min-height:30px}
button:focus-visible,summary:focus-visible{outline:2px solid var(--c0);outline-offset:1px}
.chip{background:none;border-color:transparent;padding:2px 7px 2px 4px;flex:none}
.chip:hover{background:var(--raised)}
.chip[aria-pressed=true]{background:var(--raised);border-color:var(--ink)}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--paper);
 font-size:12.5px;line-height:1.4;padding:6px 9px;border-radius:6px;white-space:pre-line;
 max-width:min(280px,90vw);overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
#tip:first-line{font-weight:650}
#tip[hidden]{display:none}
footer{margin:48px auto 64px}
"""

_PHONE = """
.chips{flex-wrap:nowrap}html{scroll-padding-top:56px}
header{padding-top:26px}section{margin-top:44px}.wide{display:none}.narrow{display:block}
.summary tr>:last-child{display:none}.summary{font-size:13px}
.summary th,.summary td{white-space:normal;padding-right:8px}
.summary .n{white-space:nowrap}.summary thead td{border:0}
thead th{vertical-align:bottom}
.summary td:nth-child(2){white-space:nowrap;overflow:hidden;text-overflow:ellipsis;max-width:28vw}
"""
_PRINT = """
@page{margin:14mm}
body{font-size:11pt}.bar,.contents,footer,#tip,details{display:none}
section{margin-top:26px}figure,.maps{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible}.all{font-size:6.5pt}.all th,.all td{padding:2px 5px 2px 0}
.all th[scope=row]{position:static}.wide{display:block}.narrow{display:none}
.grid{grid-template-columns:1fr 1fr;gap:18px}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
"""


def style() -> str:
    """The whole of the page's CSS."""
    colors = "".join(f".c{i}{{color:var(--c{i})}}" for i in _COLORS)
    fills = "".join(f".p{i}{{fill:var(--p{i});--own:var(--p{i})}}" for i in _FILLS)
    dark = f"color-scheme:dark;{_variables(DARK)}"
    themes = (
        f":root{{color-scheme:light;{_variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}"
    )
    phone = f"@media screen and (max-width:760px){{{_PHONE}}}"
    rules = (themes, _PAGE, _TABLES, _CHARTS, colors, fills, _CONTROLS, phone)
    return "".join(rules) + f"@media print{{{_PRINT}}}"


def _variables(theme: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in theme.items())
