// A labelled field for one image file: drop it there, or choose it with the keyboard or the mouse.
function render({ model, el }) {
  const label = document.createElement("label");
  label.className = "hspace-drop";
  const words = document.createElement("span");
  words.textContent = model.get("label");
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*,.npy";
  label.append(words, input);
  el.append(label);

  async function take(file) {
    if (file) model.send({ name: file.name }, undefined, [await file.arrayBuffer()]);
    input.value = "";
  }
  input.addEventListener("change", () => take(input.files[0]));
  for (const name of ["dragenter", "dragover"]) {
    label.addEventListener(name, (event) => {
      event.preventDefault();
      label.classList.add("hspace-over");
    });
  }
  label.addEventListener("dragleave", () => label.classList.remove("hspace-over"));
  label.addEventListener("drop", (event) => {
    event.preventDefault();
    label.classList.remove("hspace-over");
    take(event.dataTransfer.files[0]);
  });
}
export default { render };
