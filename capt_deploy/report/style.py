"""How the page of a report looks: light, dark, narrow, printed."""

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5a5a5a; --line: #d5d5d5;
  --paper: #fff; --panel: #f5f5f3; --bar: #9a9a9a; --right: #1668b8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a8a8a8; --line: #444; --paper: #161616; --panel: #222;
    --bar: #777; --right: #6db3f2; }
  img.plot { filter: invert(0.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1180px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .4rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p, ul { margin: .3rem 0 .8rem; max-width: 46rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none;
  max-width: none; }
a { color: var(--right); }
.soft, caption, figcaption { color: var(--soft); }
.warn { border-left: 4px solid var(--ink); padding: .3rem .8rem; background: var(--panel); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
table { min-width: min(26rem, 100%); }
caption { text-align: left; padding: .3rem 0; max-width: min(46rem, 100vw - 2rem); }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--ink); }
.number { text-align: right; white-space: nowrap; }
.headline .first { padding-left: 1.2rem; }
thead .number { white-space: normal; max-width: 7.5rem; }
th.name { min-width: 7rem; max-width: 22rem; }
td.name { max-width: 40rem; }
.main th, .main td { font-weight: 600; }
small { display: block; font-weight: 400; font-size: .8rem; color: var(--soft); }
.plots { display: grid; gap: 1rem 1.2rem; align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(min(336px, 100%), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .9rem; line-height: 1.35; }
figcaption b { color: var(--ink); }
img.plot { display: block; max-width: 100%; height: auto; }
.scroll img.plot { max-width: none; }
.cards { display: grid; gap: .8rem; padding: 0; list-style: none; max-width: none;
  grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); }
.card { background: var(--panel); padding: .7rem; border-radius: 6px; break-inside: avoid;
  font-size: .85rem; line-height: 1.3; }
.card header div { color: var(--soft); min-width: 0; }
.card header { display: flex; gap: .7rem; margin-bottom: .4rem; }
.photo { flex: none; width: 96px; height: 96px; object-fit: contain; }
.tiny { image-rendering: pixelated; }
div.photo { display: grid; place-items: center; text-align: center; color: var(--soft);
  border: 1px dashed var(--soft); }
.card b { display: block; font-size: .95rem; color: var(--ink); }
.card h4 { margin: .5rem 0 .1rem; font-size: .8rem; color: var(--soft); font-weight: 600; }
.bars { display: grid; grid-template-columns: minmax(0, 1fr) 27% 3.4rem; gap: .1rem .5rem;
  margin: 0; }
.bars dt { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; }
.bars dd { margin: 0; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.bars .right { color: var(--right); font-weight: 600; }
.bar { width: 100%; height: .7rem; align-self: center; }
.bar rect { fill: var(--bar); }
.bar.right rect { fill: var(--right); }
@media (max-width: 600px) {
  body { padding: 1rem .9rem 3rem; }
  .scroll thead th:first-child, .scroll tbody th { position: sticky; left: 0;
    background: var(--paper); }
  th, td { padding-right: .7rem; }
  th.name { max-width: 10rem; min-width: 5.5rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff;
    --panel: #fff; --bar: #999; --right: #1668b8; }
  img.plot { filter: none; }
  html { font-size: 12px; }
  body { font-size: 12px; max-width: none; padding: 0; }
  th, td { padding: .2rem .5rem .2rem 0; }
  .headline { font-size: .8rem; }
  .headline .first { padding-left: .4rem; }
  .plots { grid-template-columns: repeat(3, 1fr); }
  nav { display: none; }
  .card { border: 1px solid var(--line); }
  .scroll { overflow: visible; }
  .scroll img.plot { max-width: 100%; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
  .bar, .bar rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
