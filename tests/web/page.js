// Asks an export in a browser, on several threads, what requests.json holds, and tells the server of this page.
Object.defineProperty(navigator, "hardwareConcurrency", { value: 8 }); // on small machines too
const { Pipeline } = await import("./bertology-serve-web.js");

let told;
try {
  if (!crossOriginIsolated)
    throw new Error("the page may not use several threads");
  const pipeline = await Pipeline.open("export");
  const [batch] = await (await fetch("requests.json")).json();
  told = await pipeline.answer(batch);
} catch (problem) {
  told = `${problem.name}: ${problem.message}`;
}
await fetch("answers", { method: "POST", body: JSON.stringify(told) });
