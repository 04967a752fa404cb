// The AI SDK's text, objects and tools, and OpenAI's runTools; prints a JSON report. usage: node ai_sdk.mjs URL MODEL
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const settings = { temperature: 0, maxOutputTokens: 200, maxRetries: 0, seed: 1 };
const compatible = createOpenAICompatible({
  name: "quickchange", baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const models = { compatible: compatible(name), chat: openai.chat(name), responses: openai.responses(name) };
const schema = z.object({ color: z.enum(["red", "green"]), size: z.number().int().min(0).max(9) });
const multiply = tool({
  description: "Multiply two numbers.",
  inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
  execute: async ({ a, b }) => a * b,
});
const report = {};

async function run(title, work) {
  try {
    report[title] = (await work()) ? "ok" : "not true";
  } catch (error) {
    report[title] = `${error.name}: ${error.message}`;
  }
}

for (const [api, model] of Object.entries(models)) {
  await run(`${api} text`, async () => (await generateText({ ...settings, model, prompt: "Name a fruit." })).text);
  await run(`${api} stream`, async () => {
    const result = streamText({ ...settings, model, prompt: "Name a fruit." });
    let text = "";
    for await (const part of result.textStream) text += part;
    return text && (await result.usage).outputTokens > 0;
  });
  await run(`${api} object`, async () =>
    schema.safeParse((await generateObject({ ...settings, model, schema, prompt: "An apple." })).object).success);
  await run(`${api} object stream`, async () => {
    const result = streamObject({ ...settings, model, schema, prompt: "An apple." });
    for await (const part of result.partialObjectStream) if (part === undefined) return false;
    return schema.safeParse(await result.object).success;
  });
  await run(`${api} tool`, async () => {
    const { toolCalls, toolResults } = await generateText({
      ...settings, model, tools: { multiply }, toolChoice: "required", prompt: "What is 2 times 3?",
    });
    return toolCalls.length && toolResults.length === toolCalls.length && toolCalls[0].toolName === "multiply";
  });
  await run(`${api} tool stream`, async () => {
    const result = streamText({
      ...settings, model, tools: { multiply }, toolChoice: { type: "tool", toolName: "multiply" }, prompt: "2 times 3?",
    });
    await result.consumeStream();
    return (await result.toolResults).length === (await result.toolCalls).length && (await result.toolCalls).length;
  });
}

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model: name, messages: [{ role: "user", content: "What is 2 times 3?" }], max_tokens: 100, temperature: 0 };
const multiplied = [];
const functions = {
  type: "function",
  function: {
    name: "multiply", description: "Multiply two numbers.", parse: JSON.parse,
    function: ({ a, b }) => { multiplied.push([a, b]); return String(a * b); },
    parameters: {
      type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } }, required: ["a", "b"],
      additionalProperties: false,
    },
  },
};
for (const stream of [false, true]) {
  await run(`runTools${stream ? " streamed" : ""}`, async () => {
    const runner = client.chat.completions.runTools({
      ...asked, stream, tools: [functions], tool_choice: { type: "function", function: { name: "multiply" } },
    });
    await runner.finalMessage();
    return multiplied.length && multiplied.every(([a, b]) => Number.isInteger(a) && Number.isInteger(b));
  });
}
await run("parsed stream", async () => {
  const stream = client.chat.completions.stream({
    ...asked,
    response_format: { type: "json_schema", json_schema: { name: "color", strict: true, schema: z.toJSONSchema(schema) } },
  });
  return schema.safeParse(JSON.parse(await stream.finalContent())).success;
});
console.log(JSON.stringify(report));
