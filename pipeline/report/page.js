"use strict";
// Interactive parts of the page: the sample grids over training, and the attention explorer.

const HEAT = [255, 138, 0];

function make(name, attributes = {}, ...content) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...content);
  return element;
}

// Sample grids: a slider that selects a grid, and a button that plays all grids.
function flipbook(root) {
  const frames = [...root.querySelectorAll(".frames img")];
  if (frames.length < 2) return;
  const slider = make("input", { type: "range", min: 0, max: frames.length - 1, value: frames.length - 1 });
  const caption = make("output");
  const play = make("button", { type: "button" }, "play");
  let timer = null;

  function show(index) {
    frames.forEach((frame, i) => { frame.hidden = i !== index; });
    slider.value = index;
    caption.textContent = frames[index].dataset.caption;
    slider.setAttribute("aria-valuetext", frames[index].dataset.caption);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "play";
  }

  slider.setAttribute("aria-label", "position in training");
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    play.textContent = "stop";
    timer = setInterval(() => show((Number(slider.value) + 1) % frames.length), 700);
  });
  root.prepend(make("div", { class: "bar" }, play, slider, caption));
  show(frames.length - 1);
}

// Attention explorer: an image, a point of the image, and a panel for each layer. The panel shows the attention of the
// layer from the point.
function explorer(root) {
  const { scale, layers, images } = JSON.parse(root.querySelector("script").textContent);
  // A byte stores a share; `times` has the share as a multiple of the uniform share.
  const times = Array.from({ length: 256 }, (_, byte) => 2 ** ((byte - scale.even) / scale.doubling));
  const finest = Math.max(...layers.map((layer) => layer.queries));
  const choices = images.map((image, i) => {
    const picture = make("img", { src: image.source, alt: "", class: "pixels" });
    const button = make("button", { type: "button" }, picture, image.name);
    button.addEventListener("click", () => choose(i));
    return button;
  });
  const panels = [panel("image", finest), ...layers.map((layer, i) => layerPanel(layer, i))];
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  let maps, row = Math.floor(finest / 2), column = row;

  // A panel with the image and the point, on a grid of `cells` cells per side. A pointer and arrow keys move the point.
  function panel(title, cells, ...over) {
    const image = make("img", { alt: "", class: "pixels" });
    const point = make("span", { class: "point" });
    const label = `${title}: arrow keys move the point`;
    const map = make("div", { class: "map", tabindex: 0, role: "application", "aria-label": label }, image, ...over, point);
    const step = finest / cells;
    const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
    map.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (move === undefined) return;
      event.preventDefault();
      moveTo(row + move[0], column + move[1]);
    });
    const pointed = (event) => {
      const box = map.getBoundingClientRect();
      moveTo(Math.floor((event.clientY - box.top) / box.height * finest),
        Math.floor((event.clientX - box.left) / box.width * finest));
    };
    map.addEventListener("click", pointed);
    // Dragging the mouse moves the point. Dragging a finger scrolls the page.
    map.addEventListener("pointermove", (event) => { if (event.buttons && event.pointerType === "mouse") pointed(event); });
    return {
      element: make("figure", {}, map, make("figcaption", {}, title)),
      show(source, name) { image.src = source; image.alt = name; },
      draw() {
        const size = 100 / cells;
        const [y, x] = [row, column].map((place) => Math.floor(place / step));
        point.style.cssText = `left:${x * size}%;top:${y * size}%;width:${size}%;height:${size}%`;
        return `From row ${y + 1}, column ${x + 1} of ${cells}:`;
      },
    };
  }

  // A panel with the layer's map over the image.
  function layerPanel({ title, queries, keys, gamma }, index) {
    const canvas = make("canvas", { width: keys, height: keys });
    const context = canvas.getContext("2d");
    const base = panel(`${title}, γ = ${gamma.toPrecision(3)}`, queries, canvas);
    const draw = () => {
      base.draw();
      const [y, x] = [row, column].map((place) => Math.floor(place * queries / finest));
      const start = (y * queries + x) * keys * keys;
      const map = maps[index].subarray(start, start + keys * keys);
      const pixels = context.createImageData(keys, keys);
      map.forEach((byte, i) => pixels.data.set([...HEAT, 217 * Math.min(1, times[byte] / scale.full)], 4 * i));
      context.putImageData(pixels, 0, 0);
      const strongest = map.indexOf(Math.max(...map));
      const place = `row ${Math.floor(strongest / keys) + 1}, column ${strongest % keys + 1} of ${keys}`;
      return `${title}, attends most to ${place}, with ${times[map[strongest]].toPrecision(2)} times the uniform share`;
    };
    return { ...base, draw };
  }

  function choose(i) {
    choices.forEach((button, j) => button.setAttribute("aria-pressed", i === j));
    maps = images[i].maps.map((text) => Uint8Array.from(atob(text), (byte) => byte.charCodeAt(0)));
    panels.forEach((one) => one.show(images[i].source, images[i].name));
    draw();
  }

  function moveTo(toRow, toColumn) {
    row = Math.min(Math.max(toRow, 0), finest - 1);
    column = Math.min(Math.max(toColumn, 0), finest - 1);
    draw();
  }

  function draw() {
    const [from, ...sentences] = panels.map((one) => one.draw());
    readout.textContent = `${from} ${sentences.join("; ")}.`;
  }

  root.append(
    make("div", { class: "choices", role: "group", "aria-label": "image" }, ...choices),
    make("div", { class: "panels" }, ...panels.map((one) => one.element)),
    readout,
  );
  choose(0);
}

document.querySelectorAll(".flipbook").forEach(flipbook);
document.querySelectorAll(".explorer").forEach(explorer);
