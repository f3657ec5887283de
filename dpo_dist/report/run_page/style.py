"""Style sheet of the page, added to that of `html_page`."""

PAGE_STYLE = """
:root { --error: #b3264a; --warning: #a85b06; --good: #1a7f5a; --note: #4b6a9b; --fill: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --fill: #5eb5f0; --note: #8fb0e0; } }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 14px; margin: 12px 0; }
p { max-width: 82ch; overflow-wrap: anywhere; }
.verdict { border: 1px solid var(--line); border-left: 6px solid var(--note); border-radius: 8px; }
.verdict { padding: 4px 20px 12px; margin: 20px 0; }
.verdict h2 { margin: 12px 0 0; font-size: 14px; color: var(--quiet); font-weight: 500; }
.verdict.good { border-left-color: var(--good); }
.verdict.warning { border-left-color: #d98a1f; }
.verdict.error { border-left-color: var(--error); }
.sentence { font-size: 19px; line-height: 1.4; font-weight: 600; margin: 4px 0 8px; max-width: 72ch; }
.verdict ol { margin: 8px 0 0; padding-left: 22px; }
.verdict li { margin: 10px 0; max-width: 86ch; overflow-wrap: anywhere; }
.finding ul { margin: 4px 0; padding-left: 18px; }
.finding li { overflow-wrap: anywhere; }
.advice { color: var(--quiet); }
.advice b { color: CanvasText; }
.tiles div { min-width: 0; overflow-wrap: anywhere; }
.wide table { width: auto; min-width: 50%; }
.wide td { overflow-wrap: normal; }
.wide td small { color: var(--quiet); }
.numbers td:first-child, .numbers th:first-child { text-align: left; overflow-wrap: anywhere; }
.numbers td:first-child { max-width: 260px; }
.numbers td:first-child small { display: block; font-size: 12px; }
.counts td:first-child, .counts th:first-child { text-align: right; }
.counts td small { display: block; font-size: 12px; }
.numbers td, .phases td, .counts td:first-child { white-space: nowrap; }
.numbers td:first-child { white-space: normal; min-width: 90px; }
.phases td:first-child { text-align: left; white-space: normal; }
.phases td small { display: block; font-size: 12px; }
.phases meter { width: 160px; }
.interval { overflow: visible; width: 110px; height: 13px; vertical-align: middle; margin-left: 8px; }
.interval .track { stroke: var(--line); stroke-width: 2; }
.interval .half { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 2; }
.interval path.fill { stroke: var(--fill); stroke-width: 4; }
.interval circle.fill { fill: var(--fill); }
article { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; margin: 10px 0; }
article p { margin: 6px 0; }
article .badge { font-size: 13px; padding: 1px 10px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--tile); border-radius: 8px; }
pre { padding: 12px 14px; font-size: 13px; }
section details, details details { margin-top: 10px; }
details summary { font-size: 14px; }
@media (max-width: 600px) {
  main { padding: 14px; }
  .facts th { width: 38%; }
  .facts th, .facts td { padding-right: 8px; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
  .tiles b { font-size: 20px; }
  .sentence { font-size: 17px; }
  .verdict { padding: 4px 14px 12px; }
  .phases meter { display: none; }
}
@media print { details:not([open]) { display: none; } nav { display: none; } }
"""
