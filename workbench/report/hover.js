const graph = document.getElementById("{plot_id}");
const tip = document.createElement("div");
tip.className = "hover-thumbnail";
tip.style.cssText = "position:absolute;display:none;pointer-events:none;z-index:1000;padding:6px;background:#fff;" +
  "border:1px solid #999;border-radius:4px;box-shadow:0 2px 8px rgba(0,0,0,.25);font:12px sans-serif;color:#222;" +
  "text-align:center;white-space:pre-line";
const picture = document.createElement("img");
picture.alt = "";
picture.style.cssText =
  "display:block;width:96px;height:96px;object-fit:contain;margin:0 auto 4px;image-rendering:pixelated";
const words = document.createElement("span");
tip.append(picture, words);
graph.style.position = "relative";
graph.append(tip);
graph.on("plotly_hover", (hover) => {
  const point = hover.points[0];
  const [thumbnail, text] = point.customdata;
  picture.src = thumbnail;
  words.textContent = text;
  tip.style.display = "block";
  const frame = graph.getBoundingClientRect();
  const x = hover.event.clientX - frame.left, y = hover.event.clientY - frame.top;
  tip.style.left = (x + 16 + tip.offsetWidth > frame.width ? x - 16 - tip.offsetWidth : x + 16) + "px";
  tip.style.top = Math.max(0, Math.min(y - tip.offsetHeight / 2, frame.height - tip.offsetHeight)) + "px";
});
graph.on("plotly_unhover", () => { tip.style.display = "none"; });
