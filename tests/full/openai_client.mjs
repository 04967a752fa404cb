// What a JavaScript program does with the server; prints what it got as JSON. usage: node openai_client.mjs BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello! How are you?" }];
const report = { models: [], answers: {} };

for await (const model of client.models.list()) report.models.push(model.id);

for (const model of report.models) {
  const asked = { model, messages, max_tokens: 24, temperature: 0 };
  const whole = await client.chat.completions.create(asked);
  const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  const streamed = { text: "", finish_reasons: [], models: [], usage: null };
  for await (const chunk of stream) {
    streamed.models.push(chunk.model);
    streamed.text += chunk.choices[0]?.delta?.content ?? "";
    if (chunk.choices[0]?.finish_reason) streamed.finish_reasons.push(chunk.choices[0].finish_reason);
    if (chunk.usage) streamed.usage = chunk.usage;
  }
  const choice = whole.choices[0];
  report.answers[model] = {
    model: whole.model,
    text: choice.message.content,
    finish_reason: choice.finish_reason,
    usage: whole.usage,
    streamed,
  };
}

const helper = client.chat.completions.stream({ model: report.models[0], messages, max_tokens: 8, temperature: 0 });
report.helper = await helper.finalContent();

// At this temperature the end of a turn is one token among thousands: the answer would be as long as it may.
const left = await client.chat.completions.create({ model: report.models[0], messages, temperature: 2, stream: true });
for await (const chunk of left) {
  report.left = chunk.id;
  break; // leaving the loop closes the connection
}

try {
  await client.chat.completions.create({ model: "nobody", messages });
} catch (error) {
  report.error = { name: error.constructor.name, status: error.status, code: error.code, param: error.param };
}

console.log(JSON.stringify(report));
