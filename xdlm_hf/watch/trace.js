// The page of a trace: its runs are stored in it, deflated.
async function unpack() {
  const bytes = Uint8Array.from(atob(get("data").textContent), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

unpack().then(data => {
  get("note").textContent = data.length === 1 ? data[0].note : "";
  document.querySelector("main").classList.toggle("pair", data.length > 1);
  runs = data.map(run => new Run(run, data.length === 1));
  runs[0].note.hidden = data.length === 1; // it is below the heading
  data[0].rows.forEach((_, i) => get("row").append(new Option(i, i)));
  get("rows").hidden = data[0].rows.length === 1;
  get("colours").hidden = data.every(run => run.images);
  if (data[0].images) get("hover").textContent = "A framed cell shows its token when pointed at; hatched cells are open.";
  get("colour").options[2].disabled = !data.some(run => run.confident);
  listen();
  step = length();
  choose(0);
  document.body.dataset.ready = "yes";
}).catch(error => { get("note").textContent = "The trace cannot be read: " + error; });
