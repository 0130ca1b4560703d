"use strict";
(() => {
  const scroller = document.querySelector(".scroller");
  const tip = document.getElementById("tip");

  if (scroller) {
    const lanes = scroller.querySelector(".lanes");
    const seconds = Number(lanes.dataset.seconds);
    const controls = document.querySelector(".zoom");
    const texts = [...lanes.querySelectorAll(".lane:not(.axis) text")];
    const rects = [...lanes.querySelectorAll(".lane rect")];
    const narrowest = rects.length ? Math.min(...rects.map((r) => r.width.baseVal.valueInSpecifiedUnits)) : 0;
    let zoom = 1;

    // Numbers that fit into their bars, and gaps between bars where they leave something of them.
    const fit = () => {
      const pixels = lanes.querySelector("svg").getBoundingClientRect().width / 100;
      for (const text of texts) {
        text.classList.toggle("fits", Number(text.dataset.w) * pixels > 7 * text.textContent.length + 3);
      }
      lanes.classList.toggle("crowded", narrowest * pixels < 4);
      lanes.classList.toggle("zoomed", zoom >= 4);
    };

    // `at`: the place in the scroller, in pixels, that stays where it is.
    const setZoom = (wanted, at = scroller.clientWidth / 2) => {
      const next = Math.min(256, Math.max(1, wanted));
      const there = (scroller.scrollLeft + at) / zoom;
      zoom = next;
      lanes.style.setProperty("--zoom", zoom);
      scroller.scrollLeft = there * zoom - at;
      controls.querySelector("output").textContent = `${zoom < 10 ? Number(zoom.toFixed(1)) : Math.round(zoom)} ×`;
      fit();
    };

    const actions = { in: () => setZoom(zoom * 2), out: () => setZoom(zoom / 2), fit: () => setZoom(1) };
    controls.hidden = false;
    controls.addEventListener("click", (event) => actions[event.target.dataset.zoom]?.());
    scroller.addEventListener("keydown", (event) => {
      const action = { "+": "in", "=": "in", "-": "out", "0": "fit" }[event.key];
      if (action && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        actions[action]();
      }
    });
    scroller.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      setZoom(zoom * 2 ** (-event.deltaY / 200), event.clientX - scroller.getBoundingClientRect().left);
    }, { passive: false });
    addEventListener("resize", fit);
    fit();

    const time = (value) => {
      const [scale, unit] = value >= 1 || value === 0 ? [1, "s"] : value >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
      return `${Number((value * scale).toPrecision(4))} ${unit}`;
    };
    const names = { forward_backward: "forward and backward", prepare: "preparation", initialize: "initialization" };
    const describe = (rect) => {
      const kind = rect.getAttribute("class");
      const begin = (rect.x.baseVal.valueInSpecifiedUnits / 100) * seconds;
      const length = (rect.width.baseVal.valueInSpecifiedUnits / 100) * seconds;
      const lane = rect.closest(".lane").querySelector(".lane-name").textContent;
      const what = (names[kind] ?? kind) + ("m" in rect.dataset ? ` of microbatch ${rect.dataset.m}` : "");
      return `${lane}: ${what}\n${time(length)}, from ${time(begin)} to ${time(begin + length)}`;
    };
    lanes.addEventListener("mousemove", (event) => {
      const rect = event.target.closest("rect");
      tip.hidden = !rect;
      if (!rect) return;
      tip.textContent = describe(rect);
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - box.width - 8)}px`;
      tip.style.top = `${event.clientY + box.height + 24 > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16}px`;
    });
    lanes.addEventListener("mouseleave", () => { tip.hidden = true; });
  }

  const filter = document.querySelector(".filter");
  if (filter) {
    const rows = [...document.querySelectorAll("details.shardings tbody tr")];
    const found = filter.querySelector("output");
    filter.hidden = false;
    filter.querySelector("input").addEventListener("input", (event) => {
      const wanted = event.target.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      found.textContent = wanted ? `${shown} of ${rows.length}` : "";
      if (wanted) document.querySelectorAll("details.shardings").forEach((group) => { group.open = true; });
    });
  }
})();
