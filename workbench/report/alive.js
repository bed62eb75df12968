// Shows a widget without a kernel. KEY is the id of its element, which tells its view from others in the address.
const here = document.getElementById("KEY"), state = JSON.parse(here.nextElementSibling.textContent);
const linked = () => location.hash.slice(1).split("&").find((part) => part.startsWith("KEY="))?.slice("KEY=".length);
// An address may name no view, or a broken one.
try { state.view = JSON.parse(decodeURIComponent(linked())); } catch {}
addEventListener("hashchange", () => linked() && location.reload());
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; },
  save_changes() {
    const others = location.hash.slice(1).split("&").filter((part) => part.includes("=") && !part.startsWith("KEY="));
    const own = "KEY=" + encodeURIComponent(JSON.stringify(state.view));
    history.replaceState(null, "", "#" + [...others, own].join("&"));
  },
  on() {}, off() {},
};
const code = URL.createObjectURL(new Blob([state._esm], { type: "text/javascript" }));
(await import(code)).default.render({ model, el: here });
