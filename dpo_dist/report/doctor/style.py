"""Style sheet of the doctor's page, added to that of `html_page`."""

DOCTOR_STYLE = """
:root { --error: #b3264a; --warning: #a85b06; --note: #4b6a9b; --fill: #4c78a8; --trained: #d5efe0; }
:root { --special: #e4e0f7; --cut: #f6dede; }
@media (prefers-color-scheme: dark) {
  :root { --fill: #7aa6d8; --trained: #17402c; --special: #352f5c; --cut: #552a2f; }
}
nav a { margin-right: 14px; }
h4 { font-size: 13px; font-weight: 600; color: var(--quiet); margin: 12px 0 4px; }
.badge { font-size: 13px; padding: 1px 10px; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 10px 0; }
article p { margin: 6px 0; overflow-wrap: anywhere; }
.finding { border-left: 4px solid var(--note); }
.finding.error { border-left-color: var(--error); }
.finding.warning { border-left-color: var(--warning); }
.head { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; }
.head small, summary small { color: var(--quiet); font-weight: 400; overflow-wrap: anywhere; }
.wide td { overflow-wrap: normal; min-width: 60px; }
.wide .facts td { overflow-wrap: anywhere; }
.numbers td:first-child, .numbers th:first-child { text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: 18px; }
figure { margin: 0; flex: 1 1 260px; max-width: 400px; }
figcaption { font-size: 13px; margin-bottom: 4px; }
figure small { color: var(--quiet); font-size: 12px; }
.chart { width: 100%; height: auto; }
.chart text { font-size: 11px; fill: var(--quiet); }
.fill { fill: var(--fill); }
.track { fill: var(--line); }
.axis { stroke: var(--line); }
.limit { stroke: var(--error); stroke-dasharray: 4 3; }
.bar { width: 120px; height: 10px; }
.warning:is(p) { border-left: 4px solid var(--warning); padding-left: 12px; }
.switch { position: absolute; opacity: 0; width: 1px; height: 1px; }
.button { display: inline-block; border: 1px solid var(--line); border-radius: 6px; padding: 3px 12px; }
.button { cursor: pointer; font-size: 13px; margin: 6px 0; background: var(--tile); }
.switch:focus-visible + .button { outline: 2px solid var(--fill); }
.switch:checked + .button { border-color: var(--fill); }
.texts { display: none; }
.switch:checked ~ .texts, #all-texts:checked ~ .pairs .texts { display: block; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font-size: 14px; }
.text { border: 1px solid var(--line); border-radius: 6px; padding: 8px 10px; }
.text { max-height: 420px; overflow-y: auto; }
.legend span, .legend i { margin-right: 10px; }
.trained { background: var(--trained); }
.special { background: var(--special); border-radius: 4px; font: 12px ui-monospace, monospace; }
.cut { background: var(--cut); text-decoration: line-through; }
.omitted { color: var(--quiet); font-style: italic; display: block; }
@media (max-width: 640px) { main { padding: 14px; } h1 { font-size: 22px; } }
"""
