"""Beginnings of text of many kinds, written for this purpose; each is continued by the model, see ``samples.py``.

Those in languages that a model may not write well are longer: what it writes itself would not tell how such text goes through it.
"""

from __future__ import annotations

# Of openings that begin with this the rest is a user's turn.
CHAT = "chat: "
OPENINGS = (
    "The old bridge across the river was closed in the spring, and people from both villages",
    'def merge_intervals(intervals):\n    """Join the intervals that overlap."""\n',
    "Margaret Ellis (born 12 May 1871) was a painter and teacher whose early work",
    CHAT + "A train leaves at 14:20 and arrives at 17:05. How long does it take? Explain step by step.",
    '{"orders": [{"id": 1041, "customer": "A. Novak", "items": [{"sku": "K-220", "count": 3, "price": 12.5}',
    "Our shop opened in 2009 with a simple idea: to make",
    "Der Vertrag wurde am Montag unterzeichnet. Nach Angaben der Stadt sollen die Arbeiten an der Brücke noch in diesem Jahr beginnen und "
    "höchstens achtzehn Monate dauern. Während dieser Zeit wird der Verkehr über die Nebenstraßen geleitet. Anwohner befürchten, dass es "
    "vor allem am Morgen zu langen Staus kommt. Die Verwaltung hält dagegen, man habe aus früheren Fehlern gelernt: Dieses Mal würden die "
    "Ampeln angepasst, und für Busse bleibe eine Spur frei. Ob das reicht, wird sich",
    "2024-03-11 08:14:02,117 INFO  [worker-3] request id=9f31 path=/api/items status=200 ms=41\n2024-03-11 08:14:02,",
    "The regiment landed on the island in August and was ordered to",
    "La reunión empezó con retraso porque algunos de los invitados no encontraban la sala. Cuando por fin estuvieron todos sentados, la "
    "directora explicó las cuentas del año: las ventas habían subido un poco, pero los gastos de transporte eran mucho mayores que antes. "
    "«Si no cambiamos de proveedor», dijo, «tendremos que subir los precios en otoño.» Nadie respondió enseguida. Después de un rato, uno de",
    "17 + 28 = 45\n36 + 49 = 85\n128 - 59 = 69\n12 * 11 = ",
    "Hi everyone, I have a question about my washing machine. Since last week it",
    "#include <stdio.h>\n#include <stdlib.h>\n\nstatic int compare(const void *a, const void *b)\n{\n",
    CHAT + "Write a short letter to a neighbour about the noise at night.",
    "Researchers have found that birds which live near busy roads",
    "| city | inhabitants | area in km2 |\n|---|---|---|\n| Graz | 291,000 | 127.6 |\n| Brno |",
    "中国的城市在过去二十年里发生了很大的变化，许多人从农村搬到了城市。新的地铁线路每年都在增加，老街区也慢慢变成了购物中心。"
    "不过，住在这里的老人常常说，他们还是怀念以前的生活：邻居之间互相认识，孩子们在院子里一起玩。现在大家都很忙，",
    "I bought this tent for a trip with my two sons and",
    "okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay okay",
    "<html>\n<head><title>Opening hours</title></head>\n<body>\n<ul>\n<li>Monday: ",
    "The second album by the band was recorded in",
    "SELECT customer.name, COUNT(*) AS orders\nFROM customer\nJOIN",
    "Shopping list:\n- two lemons\n- flour\n- ",
    "Police said on Thursday that a man had been",
    "In this paper we study the stability of solutions of the equation under small changes of",
    CHAT + "What is the difference between a list and a tuple in Python? Give an example.",
    "To change the settings of your account, first open",
    "import { useState } from 'react';\n\nexport function Counter({ start = 0 }) {\n",
    "Le conseil municipal a décidé hier soir de reporter le vote sur la nouvelle piscine. Plusieurs élus ont rappelé que le coût des travaux "
    "avait presque doublé en deux ans, et que l'ancien bâtiment pouvait encore servir s'il était réparé. La maire, elle, aurait préféré une "
    "décision rapide : « Chaque mois d'attente nous coûte de l'argent », a-t-elle expliqué. Le sujet sera de nouveau à l'ordre du jour en",
    "Heavy rain fell over the coast as the storm moved north, and by the evening of",
    "hahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahahaha",
    "3.14159 2.71828 1.41421 0.57721 1.61803 31 41 59 26 53 58 97 93 23 84 62 64 33 83 27 95 02 88 41 97 16 93 99 37 51",
    "The species is found in dry forests of southern",
    "https://example.org/docs/index.html?page=2&sort=name\nhttps://example.org/img/logo.png\nhttps://",
    "#!/bin/sh\nset -e\nfor file in *.tar.gz; do\n",
    "In the third quarter the company's revenue rose by",
    "aGVsbG8gd29ybGQgdGhpcyBpcyBhIHRlc3Qgb2YgYmFzZTY0IHRleHQ=\nU29tZSBtb3JlIGxpbmVz",
    "😀 😃 😄 😁 😆 😅 😂 🙂 🙃 😉 😊 😇 😍 😘 😋 😎",
    "Thank you for your interest in our summer school. This year",
    "Chapter 1\n\nIt was late when Anna heard the door. She put down the book and",
    CHAT + "Fasse in drei Sätzen zusammen, warum es im Herbst kälter wird.",
    "She had not seen her brother since the war, and when the letter came she",
    "The committee met on 4 June. Present: Ms Okafor (chair), Mr Lindqvist, Dr Rao. Apologies:",
    "x\n\n\n\n    \n\n\t\t\n        y\n\n\n\n        z\n\n",
    "The game was released in Japan in",
    "Once the dough has rested, heat the oven to 220 degrees and",
    'Traceback (most recent call last):\n  File "app.py", line 31, in <module>\n    main()\n  File',
    "If you are looking for a quiet place to stay near the lake,",
    "Die Bahnstrecke wurde 1898 eröffnet und verbindet seitdem die beiden Täler miteinander. Sie ist 27,4 Kilometer lang, eingleisig und "
    "nicht elektrifiziert. Der Personenverkehr wurde 1972 eingestellt, weil immer weniger Fahrgäste die Züge nutzten; Güterzüge verkehrten "
    "noch bis in die neunziger Jahre. Seit 2005 betreibt ein Verein an Wochenenden einen historischen Dampfzug. Das Empfangsgebäude, ein "
    "Ziegelbau mit zwei Flügeln, steht unter Denkmalschutz und beherbergt heute",
    "BEZEICHNUNG\n    ordne - sortiert die Zeilen einer Datei\n\nBESCHREIBUNG\n    Das Programm liest alle angegebenen Dateien, ordnet "
    "ihre Zeilen und gibt das Ergebnis auf der Standardausgabe aus. Falls keine Datei angegeben ist oder der Name »-« lautet, wird von der "
    "Standardeingabe gelesen.\n\nOPTIONEN\n    -r, --umgekehrt\n        kehrt die Reihenfolge um\n    -n, --zahlen\n        vergleicht nach dem Wert der "
    "Zahlen, nicht nach Zeichen\n    -o DATEI\n        schreibt in DATEI statt auf die Standardausgabe; eine vorhandene Datei wird überschrieben, sofern "
    "sie beschreibbar ist\n\nRÜCKGABEWERT\n    0 bei Erfolg, 1, wenn",
    "Siehe auch den Abschnitt »Umgebungsvariablen«. Wird die Variable nicht gesetzt, so verwendet der Dienst die Voreinstellung aus der "
    "Konfigurationsdatei. Änderungen werden erst nach einem Neustart wirksam. Beachten Sie, dass nur der Systemverwalter diese Werte ändern darf; "
    "für gewöhnliche Benutzer schlägt der Aufruf mit einer Fehlermeldung fehl. Die maximale Länge eines Eintrags beträgt 255 Zeichen, Leerzeichen "
    "am Zeilenende werden entfernt. Ist der angegebene Pfad ein symbolischer Link, dann",
    "Le musée, ouvert en 1934, présente une collection d'outils, de meubles et de vêtements de la région. On y voit notamment un métier à "
    "tisser du XVIIIe siècle, offert par une famille du village voisin, ainsi que des photographies prises pendant la construction du barrage. "
    "Les salles du premier étage, fermées depuis l'incendie de 1988, ont été rouvertes au public après",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import argparse\nimport os\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "El río nace en las montañas y recorre unos 180 kilómetros antes de llegar al mar. En su parte alta atraviesa bosques de pinos; más abajo, "
    "el valle se ensancha y aparecen los primeros campos de arroz. Desde la Edad Media sus aguas movieron molinos, de los que todavía se "
    "conservan",
    "Liebe Frau Berger,\n\nvielen Dank für Ihren Brief. Es tut mir leid, dass die Lieferung nicht vollständig war. Ich habe gleich im Lager "
    "nachgefragt: Die beiden Stühle sind versehentlich an eine andere Adresse gegangen. Wir schicken sie Ihnen morgen früh noch einmal zu, "
    "natürlich kostenlos. Bitte geben Sie dem Fahrer den alten Lieferschein mit. Sollte noch etwas fehlen, rufen Sie mich einfach an. Mit",
    "Als sie am Abend nach Hause kam, brannte in der Küche noch Licht. Ihr Vater saß am Tisch und las in der Zeitung, wie er es immer tat, wenn er "
    "nicht schlafen konnte. »Du bist spät«, sagte er, ohne aufzusehen. Sie hängte den Mantel an den Haken und setzte sich zu ihm. Draußen hatte es "
    "wieder angefangen zu regnen, und eine Weile hörten sie beide nur auf das Wasser, das vom Dach",
    "Il treno per Bologna parte alle otto e dieci dal binario quattro. Chi ha già il biglietto può salire; gli altri devono passare dalla "
    "biglietteria, che però è chiusa fino alle nove. Ieri una signora anziana ha aspettato quasi due ore perché nessuno sapeva dirle se",
    "A cidade fica a cerca de quarenta quilómetros da costa e é conhecida pelas suas feiras de outono. Durante três dias as ruas do centro "
    "enchem-se de gente que vem comprar queijo, mel e castanhas, ou simplesmente ouvir música. Os hotéis costumam estar cheios, por isso",
    "De gemeente wil dat bewoners hun afval beter scheiden. Vanaf januari krijgt elk huishouden een extra bak voor papier, en glas wordt niet meer "
    "aan huis opgehaald. Volgens de wethouder is het nieuwe systeem goedkoper, maar veel mensen vinden het",
    "Весной дорога к деревне обычно закрыта, потому что река выходит из берегов. Почту тогда привозят на лодке, два раза в неделю. Старый учитель "
    "рассказывал, что раньше вода поднималась ещё выше и доходила до школы, а дети",
    "この町では毎年秋に小さなお祭りがあります。朝から駅前の通りに店が並び、子どもたちは太鼓をたたきながら歩きます。夜になると、川の近くで",
)
